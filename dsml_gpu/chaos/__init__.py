"""Faults on purpose: what a fleet does when devices and coordinators die, freeze, are cut off, come and leave.

`trials` plans what is tried, from a seed; `faults`, `proxy` and `fleets` have it happen to real processes; `checks` knows
what every element of every buffer must be then; `report` counts.
"""
