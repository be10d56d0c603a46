"""Networks and their layers: building, weights, sites, memory format, passes that stop at sites."""
