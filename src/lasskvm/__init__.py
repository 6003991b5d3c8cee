"""lasskvm: a KVM-shaped x86-64 virtual machine monitor that virtualizes Intel LASS on any machine."""

__version__ = "0.1.0"
