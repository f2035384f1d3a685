"""Faults done to excise on purpose: kills, damaged files, full disks, hostile input; see docs/reliability.md."""
