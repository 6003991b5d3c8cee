"""VMX for a guest that is itself a hypervisor: its capabilities, its VMCSs, and the rules for entering its guest.

The guest hypervisor is called L1 and its guest L2, as in KVM; a VMCS that L1 keeps for L2 is a vmcs12.
"""
