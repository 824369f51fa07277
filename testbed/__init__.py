"""A testbed of network namespaces: labs built from a topology, with captures that are checked."""
