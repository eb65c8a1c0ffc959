"""Which rows or columns at a time: schedules call a backend and know nothing of autograd."""
