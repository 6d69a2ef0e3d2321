"""Locks on open files, which the kernel takes back when their owner dies.

Windows, and some network file systems, have none: there each function says that it can't tell.
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


def lock_whole(fd: int) -> None:
    """Waits for the lock of an open file among processes; closing any handle of the file frees it.

    Raises:
        NoLocksError: there are no locks here.
    """
    _lock(fcntl and fcntl.lockf, fd, "LOCK_EX")


def try_lock_whole(fd: int) -> bool:
    """Takes the same lock if nobody holds it, and says whether it did.

    Unlike a lock of `try_lock_handle` it is not shared with forked processes, and it holds between
    the machines of an NFS mount that has locking.

    Raises:
        NoLocksError: there are no locks here.
    """
    return _lock(fcntl and fcntl.lockf, fd, "LOCK_EX", "LOCK_NB")


def lock_handle(fd: int) -> None:
    """Waits for the lock that belongs to the handle: a second handle of this process must wait too.

    Raises:
        NoLocksError: there are no locks here.
    """
    _lock(fcntl and fcntl.flock, fd, "LOCK_EX")


def try_lock_handle(fd: int) -> bool:
    """Takes the same lock if no other handle has it, and says whether it did.

    Raises:
        NoLocksError: there are no locks here.
    """
    return _lock(fcntl and fcntl.flock, fd, "LOCK_EX", "LOCK_NB")


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


def _lock(function, fd: int, *flags: str) -> bool:
    if fcntl is None:
        raise NoLocksError(errno.ENOSYS, "this system has no POSIX locks")
    try:
        function(fd, sum(getattr(fcntl, flag) for flag in flags))
    except OSError as error:
        if error.errno in _HELD and "LOCK_NB" in flags:
            return False
        raise NoLocksError(*error.args) from error
    return True
