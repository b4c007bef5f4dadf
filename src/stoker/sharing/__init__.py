"""Runs for others: one file that opens, and runs again, on another machine."""
