"""KVM's emulation path: instructions and events executed on the state words instead of by direct execution."""
