"""Losses and schedules of training recipes, built from `kd_loss`."""
