"""What a process runs on: ranks, device, precision, machine."""
