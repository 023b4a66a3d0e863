"""Devices and processes: what a chip can do, the mesh, hosts that find each other."""
