"""One module per project; each function has the original's name, arguments and value."""
