"""Plug-ins for other programs: lm-evaluation-harness and Ray."""
