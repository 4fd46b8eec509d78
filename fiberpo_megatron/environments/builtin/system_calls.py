"""This module makes the seccomp filter of a sandboxed program: a list of system calls that fail with EPERM.

Programs that solve tasks need none of them. The list closes what namespaces leave open: sockets of any family, memory
that no limit of a process counts (memfd, System V), other processes' memory, and large parts of the kernel that have
had holes (new namespaces, mounts, BPF, io_uring, keys). The filter stays with every process that a program starts.
"""

from __future__ import annotations

import platform
import struct

X86_64, AARCH64 = "x86_64", "aarch64"
AUDIT_ARCHITECTURES = {X86_64: 0xC000003E, AARCH64: 0xC00000B7}
REFUSED = {
    # name: number on x86_64, number on aarch64 (asm/unistd.h)
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "personality": (135, 92),
    "syslog": (103, 116),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
}
CLONE, CLONE3 = (56, 220), 435
NEW_NAMESPACES = 0x7E020080
"""The flags of clone() that make namespaces: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET and
NEWTIME."""
X32_BIT = 0x40000000
EPERM, ENOSYS = 1, 38

LOAD_WORD, JUMP_EQUAL, JUMP_NOT_BELOW, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, ERROR, KILL = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER_AT, ARCHITECTURE_AT, FIRST_ARGUMENT_AT = 0, 4, 16
"""Places in the kernel's `struct seccomp_data`."""


def seccomp_filter(machine: str | None = None) -> bytes:
    """Return the filter as a BPF program (`struct sock_filter`s in the order of this machine).

    machine: the processor, as `platform.machine()` names it; None is this one. Raises ValueError for one that has no
    list here.
    """
    machine = platform.machine() if machine is None else machine
    if machine not in AUDIT_ARCHITECTURES:
        raise ValueError(f"no list of system calls is known for the processor {machine!r}")
    column = (X86_64, AARCH64).index(machine)

    def returned(what: int) -> bytes:
        return struct.pack("=HBBI", RETURN, 0, 0, what)

    def skip_unless(jump: int, value: int, steps: int) -> bytes:
        return struct.pack("=HBBI", jump, 0, steps, value)

    parts = [
        struct.pack("=HBBI", LOAD_WORD, 0, 0, ARCHITECTURE_AT),
        struct.pack("=HBBI", JUMP_EQUAL, 1, 0, AUDIT_ARCHITECTURES[machine]),
        returned(KILL),  # calls of another architecture have other numbers
        struct.pack("=HBBI", LOAD_WORD, 0, 0, NUMBER_AT),
    ]
    if machine == X86_64:
        parts += [skip_unless(JUMP_NOT_BELOW, X32_BIT, 1), returned(KILL)]
    for numbers in REFUSED.values():
        parts += [skip_unless(JUMP_EQUAL, numbers[column], 1), returned(ERROR | EPERM)]
    # the flags of clone3 are behind a pointer, which no filter can follow; libraries fall back to clone
    parts += [skip_unless(JUMP_EQUAL, CLONE3, 1), returned(ERROR | ENOSYS)]
    parts += [
        skip_unless(JUMP_EQUAL, CLONE[column], 3),
        struct.pack("=HBBI", LOAD_WORD, 0, 0, FIRST_ARGUMENT_AT),
        skip_unless(JUMP_ANY_BIT, NEW_NAMESPACES, 1),
        returned(ERROR | EPERM),
        returned(ALLOW),
    ]
    return b"".join(parts)
