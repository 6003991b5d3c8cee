"""Virtual SGX: the enclave page cache, ENCLS on it, and the cryptography that makes an enclave worth something.

Enclaves can be created, measured, initialized, paged and debugged; nothing enters them, because ENCLU's leaf functions
are not offered.
"""
