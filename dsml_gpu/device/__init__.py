"""The device service and its executor."""
