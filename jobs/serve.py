"""Serve students by an images API: `python jobs/serve.py [NAME=]EXPORT_OR_RUN [...] [--set key=value ...] [--host H] [--port P]`."""

import sys

from flashdmd_ray.serving.command import serve_command

if __name__ == "__main__":
    sys.exit(serve_command())
