"""The host provider: the KVM API over the ioctls of /dev/kvm, one method for each."""

from lasskvm.kvm.host.ioctls import KvmIoctlError
from lasskvm.kvm.host.system import DEVICE, System
from lasskvm.kvm.host.vcpu import Vcpu
from lasskvm.kvm.host.vm import Vm

__all__ = ["DEVICE", "KvmIoctlError", "System", "Vcpu", "Vm"]
