"""Files of the owner's machine that every sandbox holds: a Python, and a copy of the inner code."""

import functools
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from dsv4.post_training.sandbox.inside.cell import PACKAGE
from dsv4.post_training.sandbox.inside.entrance import ACCOUNTS
from dsv4.post_training.sandbox.interface import SandboxError


@functools.cache
def interpreter() -> str:
    """Python that every user of the machine may execute: this one, or the system's. SandboxError if there is none."""
    tried = [f"{sys.base_prefix}/bin/python3", "/usr/local/bin/python3", "/usr/bin/python3"]
    for path in tried:
        real = Path(os.path.realpath(path))
        if real.is_file() and (os.getuid() != 0 or all(folder.stat().st_mode & 0o5 == 0o5 for folder in real.parents)):
            return str(real)
    raise SandboxError(f"no Python that all users may execute; tried {', '.join(tried)}")


@functools.cache
def code_folder() -> str:
    """Folder with a compiled copy of the inner code and the accounts of a sandbox, which every user may read.

    It is named by its contents and shared by processes of one user, so that one that is killed leaves nothing behind.
    """
    sources = {path.name: path.read_bytes() for path in sorted(Path(__file__).with_name("inside").glob("*.py"))}
    digest = hashlib.sha256(repr((interpreter(), sys.version, sources, ACCOUNTS)).encode()).hexdigest()[:16]
    shared = Path(tempfile.gettempdir(), f"dsv4-sandbox-{os.getuid()}-{digest}")
    if not shared.exists():
        made = Path(tempfile.mkdtemp(prefix="dsv4-sandbox-"))
        folder = made.joinpath(*PACKAGE.split("."))
        folder.mkdir(parents=True)
        for name, source in sources.items():
            (folder / name).write_bytes(source)
        (made / "etc").mkdir()
        for name, text in ACCOUNTS.items():
            (made / "etc" / name).write_text(text)
        subprocess.run([interpreter(), "-I", "-S", "-m", "compileall", "-q", str(made)], check=True, env={})
        for path in (made, *made.rglob("*")):  # whatever this process's mask is
            path.chmod(0o755 if path.is_dir() else 0o644)
        try:
            made.rename(shared)
        except OSError:  # another process was first
            shutil.rmtree(made)
    check_own(shared)
    return str(shared)


def check_own(folder: Path) -> None:
    """SandboxError if a folder at a name that others can guess is a link, another user's, or open to their writes."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise SandboxError(f"{folder} is not this user's own folder; remove it")
