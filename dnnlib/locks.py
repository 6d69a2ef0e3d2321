"""Locks on open files, which the kernel releases when their owner dies.

Windows and some network file systems have none: every function then raises NoLocksError.
"""

import errno
import os
import struct

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_FLOCK = "hhqqi"  # struct flock of 64-bit Linux: type, whence, start, length, process
_HELD = (errno.EACCES, errno.EAGAIN)


class NoLocksError(OSError):
    """Files can't be locked here."""


def lock_whole(fd: int, *, wait: bool = True) -> bool:
    """Takes this process's lock on an open file; closing any handle of the file releases it.

    Forked processes do not share it. On an NFS mount with locking, it also holds between machines.
    Returns whether it was taken: without `wait`, it is not if another process holds it.

    Raises:
        NoLocksError: there are no locks here.
    """
    return _lock("lockf", fd, wait)


def lock_handle(fd: int, *, wait: bool = True) -> bool:
    """Takes the lock of a file handle, which another handle, even of this process, can't take.

    Returns whether it was taken: without `wait`, it is not if another handle has it.

    Raises:
        NoLocksError: there are no locks here.
    """
    return _lock("flock", fd, wait)


def is_locked_by_another_process(fd: int) -> bool:
    """Says whether another process holds the lock of `lock_whole`, without taking it.

    Raises:
        NoLocksError: there are no locks here.
    """
    if fcntl is None:
        raise NoLocksError
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        kind = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))[0]
    except OSError as error:
        raise NoLocksError(*error.args) from error
    return kind != fcntl.F_UNLCK


def _lock(function: str, fd: int, wait: bool) -> bool:
    if fcntl is None:
        raise NoLocksError(errno.ENOSYS, "this system has no POSIX locks")
    try:
        getattr(fcntl, function)(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _HELD and not wait:
            return False
        raise NoLocksError(*error.args) from error
    return True
