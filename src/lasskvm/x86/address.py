"""Linear addresses: canonical form. Source: Intel SDM volume 1, 3.3.7.1."""


def is_canonical(address: int, linear_address_bits: int) -> bool:
    """Whether bits 63 to ``linear_address_bits - 1`` of *address* are all equal (48 bits, or 57 with CR4.LA57)."""
    upper = address >> (linear_address_bits - 1)
    return (upper == 0) | (upper == (1 << (65 - linear_address_bits)) - 1)
