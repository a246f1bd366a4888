"""A run as one HTML page that needs nothing else: read the workdir, draw, fill the template."""
