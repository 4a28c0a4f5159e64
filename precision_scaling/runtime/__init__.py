"""What every command stands on: devices, hosts, files, stopping, compilation, and the frame of command lines."""
