"""What ``python -m cwclip_kernels`` does, a file for each command."""
