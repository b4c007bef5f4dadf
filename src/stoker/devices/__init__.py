"""Where a run happens: devices, precision, strategies."""
