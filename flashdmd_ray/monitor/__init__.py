"""Detection of reward hacking: signals of a probe, the rules that judge them, and a run's monitor. Pure functions of recorded numbers."""

from flashdmd_ray.monitor.rules import Verdict
from flashdmd_ray.monitor.watch import SEVERITY, HackMonitor, summary

__all__ = ["SEVERITY", "HackMonitor", "Verdict", "summary"]
