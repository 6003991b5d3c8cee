"""KVM's emulation path: instructions and events on the state words instead of by direct execution."""
