"""Reports: pictures of runs."""
