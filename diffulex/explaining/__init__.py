"""What `diffulex.explain` adds on request: measured times, a picture, and the report of a device that is not there."""
