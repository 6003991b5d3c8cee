"""A PC around a VM: memory layout, devices, firmware interfaces, boot loaders, console."""
