"""Guest programs that state what the architecture requires, run through the KVM API."""
