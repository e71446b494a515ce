"""What blocks save for the backward: on the device, on the host, or recomputed."""
