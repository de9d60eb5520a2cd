"""File operations that follow no symbolic link, so that what lies below a root stays there.

Whoever can write below a root could put a link in place of any directory. The root itself may be
reached through links: it is resolved once (`os.path.realpath`) when somebody begins to use it.
Paths here begin with such a real root, or are a name in an open directory.

Where there is openat2(2) (Linux 5.6) a path costs one system call, else one for each of its
directories; a seccomp filter may hide it. Measured on Linux 6.18 and ext4, seven directories
deep: opening and closing a page's file takes 4.2 us, by steps 18, and with `os.open` 2.6.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_OPENAT2 = 437  # the same on all architectures but alpha
_AT_FDCWD = -100
_RESOLVE_NO_SYMLINKS = 0x04
_HOW = struct.Struct("=QQQ")  # struct open_how: flags, mode, resolve
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = (
    *(ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t),
)
_syscall.restype = ctypes.c_long


def open(path: str, flags: int, mode: int = 0o600, dir_fd: int = _AT_FDCWD) -> int:
    """`os.open` that follows no link, does not block on a FIFO and is not inherited.

    With O_EXCL the file is created with exactly `mode`, whatever the umask.

    Raises:
        OSError: ELOOP where a link is; else as `os.open`.
    """
    if "/../" in path or path.endswith("/.."):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    flags |= os.O_CLOEXEC
    if not flags & os.O_PATH:
        flags |= os.O_NONBLOCK
    fd = (_at_once if _HAS_OPENAT2 else _by_steps)(path, flags, mode, dir_fd)
    if flags & os.O_EXCL:
        try:
            if stat.S_IMODE(os.fstat(fd).st_mode) != mode:  # the umask took some
                os.fchmod(fd, mode)
        except BaseException:
            os.close(fd)
            raise
    return fd


def open_or_create(path: str, flags: int, mode: int) -> int:
    """`open`, which creates the file, with exactly `mode`, where it is missing.

    Raises:
        OSError: as `open`.
    """
    with suppress(FileNotFoundError):
        return open(path, flags)
    with suppress(FileExistsError):
        return open(path, flags | os.O_CREAT | os.O_EXCL, mode)
    return open(path, flags)


@contextmanager
def directory(path: str) -> Iterator[int]:
    """A descriptor of a directory (O_PATH), for the names in it.

    Raises:
        OSError: as `open`.
    """
    fd = open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def parent(path: str) -> Iterator[tuple[int, str]]:
    """(descriptor of the directory it is in, its name there); what fails names the whole path.

    Raises:
        OSError: as `open`.
    """
    where, _, name = path.rpartition("/")
    try:
        with directory(where or "/") as fd:
            yield fd, name or "."
    except OSError as error:
        error.filename = path
        raise


def lstat(path: str) -> os.stat_result:
    """`os.lstat`."""
    fd = open(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def lexists(path: str) -> bool:
    """`os.path.lexists`."""
    try:
        lstat(path)
    except OSError:
        return False
    return True


def unlink(path: str) -> None:
    """`os.unlink`."""
    with parent(path) as (fd, name):
        os.unlink(name, dir_fd=fd)


def rmdir(path: str) -> None:
    """`os.rmdir`."""
    with parent(path) as (fd, name):
        os.rmdir(name, dir_fd=fd)


def rename(source: str, target: str) -> None:
    """`os.rename`."""
    with parent(source) as (source_fd, old), parent(target) as (target_fd, new):
        os.rename(old, new, src_dir_fd=source_fd, dst_dir_fd=target_fd)


def mkdir(path: str, mode: int) -> None:
    """`os.mkdir` with the permission bits `mode`, whatever the umask.

    A setgid bit that the directory got from the one above it stays: with it everything below
    has the same group, so that the servers of several users can share it.
    """
    with parent(path) as (fd, name):
        _make(name, mode, fd)


def enter(path: str, root: str, mode: int) -> int:
    """A descriptor (O_PATH) of the directory `path`.

    What is missing of it below `root` is created, each directory as `mkdir` does.

    Raises:
        OSError: it cannot be; FileNotFoundError when `root` itself is gone, or what was there a
            moment ago.
    """
    try:
        return open(path, _DIRECTORY)
    except FileNotFoundError:
        if not path.startswith(f"{root}/"):
            raise
    return make(path, root, mode)


def make(path: str, root: str, mode: int) -> int:
    """`enter` for a directory that was not there a moment ago."""
    with _above(path, root, mode) as (fd, name):
        with suppress(FileExistsError):
            _make(name, mode, fd)
        return open(name, _DIRECTORY, dir_fd=fd)


def make_directories(path: str, root: str, mode: int) -> None:
    """Create `path` as `mkdir` does unless something is there, and its parents as `enter` does.

    Raises:
        OSError: as `enter`.
    """
    with _above(path, root, mode) as (fd, name), suppress(FileExistsError):
        _make(name, mode, fd)


def listdir(path: str) -> list[str]:
    """`os.listdir`."""
    fd = open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)


@contextmanager
def scandir(path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
    """`os.scandir`; an entry's `path` is its name, and it may be asked only inside."""
    fd = open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with os.scandir(fd) as entries:
            yield entries
    finally:
        os.close(fd)


@contextmanager
def _above(path: str, root: str, mode: int) -> Iterator[tuple[int, str]]:
    """`parent`, entered; what fails inside names the whole path."""
    above, _, name = path.rpartition("/")
    fd = enter(above, root, mode)
    try:
        yield fd, name
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(fd)


def _make(name: str, mode: int, dir_fd: int) -> None:
    os.mkdir(name, mode, dir_fd=dir_fd)
    made = stat.S_IMODE(os.lstat(name, dir_fd=dir_fd).st_mode)
    wanted = mode | made & stat.S_ISGID
    if made != wanted:
        fd = open(name, _DIRECTORY, dir_fd=dir_fd)
        try:
            os.chmod(f"/proc/self/fd/{fd}", wanted)
        finally:
            os.close(fd)


def _at_once(path: str, flags: int, mode: int, dir_fd: int) -> int:
    how = _HOW.pack(flags, mode if flags & os.O_CREAT else 0, _RESOLVE_NO_SYMLINKS)
    while True:
        fd: int = _syscall(_OPENAT2, dir_fd, os.fsencode(path), how, _HOW.size)
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number), path)


def _by_steps(path: str, flags: int, mode: int, dir_fd: int) -> int:
    *parents, name = path.split("/")
    here = os.open("/" if parents else ".", _DIRECTORY, dir_fd=dir_fd)
    try:
        for each in filter(None, parents):
            inner = _step(each, _DIRECTORY, 0, here)
            os.close(here)
            here = inner
        return _step(name or ".", flags, mode, here)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(here)


def _step(name: str, flags: int, mode: int, dir_fd: int) -> int:
    try:
        return os.open(name, flags | os.O_NOFOLLOW, mode, dir_fd=dir_fd)
    except NotADirectoryError:
        if stat.S_ISLNK(os.lstat(name, dir_fd=dir_fd).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
        raise


def _has_openat2() -> bool:
    try:
        os.close(_at_once("/", _DIRECTORY, 0, _AT_FDCWD))
    except OSError:
        return False
    return True


_HAS_OPENAT2 = _has_openat2()
