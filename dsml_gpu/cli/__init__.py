"""The command `dsml-gpu`."""
