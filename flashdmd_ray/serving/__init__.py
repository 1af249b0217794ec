"""A Ray Serve application that draws with exported students: an OpenAI-compatible images API. See docs/serving.md.

`app.py` wires the deployments, `api.py` is what clients see, `generator.py` draws. Importing this package imports neither torch nor Ray.
"""

LOGGER = "ray.serve.flashdmd_ray"
"""Below Serve's own logger, so that lines go where its settings say, with the names of replica and deployment."""
