"""OpenAI-compatible images API on Ray Serve for exported students. See docs/serving.md.

`app.py` wires the deployments, `api.py` is what clients see, `replica.py` generates the images. Importing this package imports neither
torch nor Ray.
"""

LOGGER = "ray.serve.flashdmd_ray"
"""Name of the service's logger. It is below Serve's own, so lines go where Serve's settings say, with replica and deployment."""
