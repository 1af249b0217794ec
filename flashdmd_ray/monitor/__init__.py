"""Is the reward being hacked? Signals of a probe (`signals`), the rules that judge them (`rules`), a run's monitor (`watch`) and pictures
for whoever reads its verdict (`evidence`)."""

from flashdmd_ray.monitor.rules import Verdict
from flashdmd_ray.monitor.watch import SEVERITY, HackMonitor, summary

__all__ = ["SEVERITY", "HackMonitor", "Verdict", "summary"]
