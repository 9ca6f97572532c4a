"""Choice of a substrate, what each says that is missing, images, and what is left after a crash."""

import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsv4.post_training.sandbox import container, guest_image, microvm
from dsv4.post_training.sandbox.container import ContainerSandbox
from dsv4.post_training.sandbox.interface import SandboxError
from dsv4.post_training.sandbox.microvm import MicrovmSandbox
from dsv4.post_training.sandbox.namespaces import NamespaceSandbox
from dsv4.post_training.sandbox.substrates import SUBSTRATES, chosen, missing, open_sandbox
from dsv4.post_training.sandbox.supervised import SupervisedSandbox
from tests.post_training.sandbox.conftest import KINDS, SMALL, Outside

ROOT = Path(__file__).parents[3]


def test_the_substrate_is_the_callers_then_the_environments_then_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSV4_SANDBOX", raising=False)
    assert chosen() == "namespaces" and chosen("container") == "container"
    monkeypatch.setenv("DSV4_SANDBOX", "container")
    assert chosen() == "container" and chosen("namespaces") == "namespaces"
    with open_sandbox("namespaces", SMALL) as box:
        assert isinstance(box, NamespaceSandbox)
    monkeypatch.setenv("DSV4_SANDBOX", "docker")
    with pytest.raises(ValueError, match="'docker' in DSV4_SANDBOX; known are namespaces, container, microvm"):
        open_sandbox()
    assert {*SUBSTRATES} == {*KINDS}


def test_namespaces_have_no_image() -> None:
    with pytest.raises(ValueError, match="image is 'debian'; namespaces have none"):
        open_sandbox("namespaces", image="debian")


@pytest.mark.parametrize("image", ["--privileged", "-v/:/host", ""])
def test_an_image_is_never_an_option_of_podman(image: str) -> None:
    with pytest.raises(ValueError, match="allowed: an image's name"):
        open_sandbox("container", image=image)


def test_a_path_that_podman_would_cut_is_refused(tmp_path: Path) -> None:
    for inside, path in (("/opt/x:rw", tmp_path), ("/opt/x", tmp_path / "a:b")):
        with pytest.raises(ValueError, match="has a colon"):
            open_sandbox("container", readable={inside: str(path)})


def test_the_root_of_containers_is_trusted_only_if_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(container, "code_folder", lambda: str(tmp_path / "code"))
    mask = os.umask(0o077)
    made = [Path(container.root_folder()) for _ in range(2)]
    os.umask(mask)
    folders = [path for path in (made[0], *made[1].rglob("*")) if not path.is_symlink()]
    assert made[0] / "run" / "sandbox" in folders and {path.stat().st_mode & 0o777 for path in folders} == {0o755}
    made[0].rename(tmp_path / "elsewhere")
    private = tmp_path / "private"
    private.mkdir(0o700)
    made[0].mkdir()
    made[0].joinpath("usr").symlink_to(private)
    made[0].chmod(0o777)
    with pytest.raises(SandboxError, match="is not this user's own folder"):
        container.root_folder()
    assert private.stat().st_mode & 0o777 == 0o700


MISSING: dict[str, tuple[Callable[[], object], str]] = {
    "podman": (ContainerSandbox, r"podman is missing \(Debian: apt-get install podman\)"),
    "qemu": (MicrovmSandbox, r"qemu-system-x86_64 is missing \(Debian: apt-get install qemu-system-x86\)"),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_program_is_named_with_its_package(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make, message = MISSING[name]
    monkeypatch.setenv("PATH", str(tmp_path))
    container.controllers.cache_clear()
    with pytest.raises(SandboxError, match=message):
        make()


def test_a_missing_kernel_and_kvm_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(microvm, "hypervisor", lambda: "qemu")
    monkeypatch.setattr(microvm, "KVM", tmp_path / "kvm")
    monkeypatch.setenv("DSV4_SANDBOX_EMULATE", "0")
    with pytest.raises(SandboxError, match="kvm is missing; DSV4_SANDBOX_EMULATE=1 emulates a machine, which is slow"):
        MicrovmSandbox()
    monkeypatch.setenv("DSV4_SANDBOX_EMULATE", "yes")
    with pytest.raises(ValueError, match="DSV4_SANDBOX_EMULATE is 'yes'"):
        MicrovmSandbox()
    monkeypatch.setattr(guest_image, "BOOT", tmp_path)
    for modules in Path("/lib/modules").glob("*/modules.dep"):
        (tmp_path / f"vmlinuz-{modules.parent.name}").touch(0o000)
    with pytest.raises(SandboxError, match="no kernel .*apt-get install linux-image-cloud-amd64"):
        guest_image.kernel()


@pytest.fixture
def silent_guest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[os.stat_result]:
    """A program that says nothing in place of qemu; what the folder of the guest's root was when it started."""
    found: list[os.stat_result] = []

    def command(box: MicrovmSandbox, root: Path, console: int) -> list[str]:
        found.append(root.parent.stat())
        return ["sleep", "60"]

    (tmp_path / "root").write_bytes(b"")
    monkeypatch.setattr(guest_image, "built", lambda image: tmp_path / "root")
    monkeypatch.setattr(guest_image, "kernel", lambda: (tmp_path, "0"))
    monkeypatch.setattr(microvm, "KVM", tmp_path / "root")
    (tmp_path / "root").chmod(0o666)
    monkeypatch.setattr(microvm, "KVM_SECONDS", 0.5)
    monkeypatch.setattr(microvm, "hypervisor", lambda: "qemu")
    monkeypatch.setattr(MicrovmSandbox, "_command", command)
    monkeypatch.delenv("DSV4_SANDBOX_EMULATE", raising=False)
    return found


@pytest.mark.usefixtures("silent_guest")
def test_a_guest_that_does_not_start_is_an_error_with_the_way_out() -> None:
    with pytest.raises(SandboxError, match="no guest started with .*DSV4_SANDBOX_EMULATE=1.*no answer within 0.5 s"):
        MicrovmSandbox()


def test_the_copy_of_what_a_guest_may_read_is_closed_to_other_users(
    silent_guest: list[os.stat_result], outside: Outside
) -> None:
    with pytest.raises(SandboxError, match="no answer"):
        MicrovmSandbox(readable={"/opt/shown": str(outside.shown)})
    (folder,) = silent_guest
    assert folder.st_mode & 0o777 == 0o700 and (folder.st_uid != 0 or os.getuid() != 0)


def entries(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Name -> mode and contents of an archive of format newc."""
    found: dict[str, tuple[int, bytes]] = {}
    place = 0
    while True:
        fields = [int(archive[at : at + 8], 16) for at in range(place + 6, place + 110, 8)]
        name = archive[place + 110 : place + 110 + fields[11] - 1].decode()
        start = place + (110 + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        assert name not in found
        found[name] = fields[1], archive[start : start + fields[6]]
        place = start + (fields[6] + 3) // 4 * 4


def test_an_images_own_first_program_does_not_replace_the_guests(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(guest_image, "modules", lambda version: {})
    image = tmp_path / "image"
    inner = Path("run/sandbox/dsv4/post_training/sandbox/inside/guest.py")
    (image / inner).parent.mkdir(parents=True)
    for name in (inner, Path("init"), Path("mark")):
        (image / name).write_text("of the image")
        (image / name).chmod(0o644)
    file = io.BytesIO()
    guest_image.write(file, str(image), "0")
    found = entries(file.getvalue())
    assert found["mark"][1] == b"of the image"
    assert found["init"][1].startswith(b"#!") and b"def main" in found[str(inner)][1]


def test_a_guest_may_read_what_its_owner_shows_and_root_shows_nothing_closed(tmp_path: Path) -> None:
    root = os.getuid() == 0
    (tmp_path / "closed").mkdir()
    (tmp_path / "program").write_bytes(b"1")
    (tmp_path / "closed" / "file").write_bytes(b"2")
    for path, mode in ((tmp_path / "program", 0o4755 if root else 0o700), (tmp_path, 0o755 if root else 0o700)):
        path.chmod(mode)
    for path, mode in ((tmp_path / "closed" / "file", 0o644), (tmp_path / "closed", 0o700)):
        path.chmod(mode)
    (tmp_path / "secret").write_bytes(b"3")
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "link").symlink_to("nothing")
    file = io.BytesIO()
    archive = guest_image.Archive(file)
    archive.tree(str(tmp_path), "/shown")
    archive.close()
    found = {name.removeprefix("shown/"): mode & 0o7777 for name, (mode, _) in entries(file.getvalue()).items()}
    closed = {} if root else {"closed": 0o755, "closed/file": 0o644, "secret": 0o644}
    assert found == {"shown": 0o755, "program": 0o755, "link": 0o777} | closed


@pytest.mark.parametrize("name", ["container", "microvm"])
def test_another_substrate_runs_a_command(name: str, outside: Outside) -> None:
    reason = missing(name)  # type: ignore[arg-type]
    if reason:
        pytest.skip(f"no sandbox of {name}: {reason}")
    with open_sandbox(name, SMALL, readable={"/opt/shown": str(outside.shown)}) as box:  # type: ignore[arg-type]
        box.put("in", b"x")
        result = box.exec("cat /opt/shown/file in; echo y >/opt/shown/new; id -u; ls /root /home")
        assert result.stdout == b"seenx1000\n", result
        assert isinstance(box, SupervisedSandbox)
        outside.assert_unharmed(box)


def containers() -> str:
    command = [container.engine(), "ps", "--all", "--filter", "label=dsv4-sandbox", "--format", "{{.Names}}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder for temporary files that other users can enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.container
def test_no_container_and_no_folder_is_left_by_an_owner_that_was_killed(open_folder: Path) -> None:
    if reason := missing("container"):
        pytest.skip(reason)
    code = "from dsv4.post_training.sandbox.container import ContainerSandbox\n"
    code += "box = ContainerSandbox()\nprint(box._name, flush=True)"
    for command in ("sleep 300", "python3 -c 'while True: pass'"):
        owner = subprocess.Popen(
            [sys.executable, "-c", f"{code}\nbox.exec({command!r})"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(open_folder)},
        )
        assert owner.stdout is not None
        name = owner.stdout.readline().strip()
        assert name in containers()
        owner.kill()
        owner.wait()
        owner.stdout.close()
        deadline = time.monotonic() + 60
        while name in containers():
            assert time.monotonic() < deadline, f"{name} is left"
            time.sleep(0.2)
    shared = f"dsv4-sandbox-{os.getuid()}-"  # by all of this user's processes
    assert [path.name for path in open_folder.iterdir() if not path.name.startswith(shared)] == []


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of an image: this machine's Python and programs, and a mark."""
    if shutil.which("cpio") is None:
        pytest.skip("cpio is missing")
    folder = tmp_path_factory.mktemp("image")
    with open(guest_image.built(), "rb") as archive:
        subprocess.run(["cpio", "-id", "--quiet"], stdin=archive, cwd=folder, check=True)
    shutil.rmtree(folder / "run")
    (folder / "init").unlink()
    (folder / "usr" / "mark").write_text("of the image")
    return folder


@pytest.mark.container
def test_a_container_of_an_image(root: Path) -> None:
    if reason := missing("container"):
        pytest.skip(reason)
    name = f"localhost/dsv4-sandbox-test-{os.getpid()}"
    with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as packed:
        command = [container.engine(), "import", "--quiet", "-", name]
        subprocess.run(command, stdin=packed.stdout, check=True, capture_output=True)
    try:
        with open_sandbox("container", SMALL, image=name) as box:
            assert box.exec("cat /usr/mark; echo x >/usr/mark").stdout == b"of the image"
            assert box.exec([box.python, "-c", "print(1)"]).stdout == b"1\n"
        with pytest.raises(SandboxError, match="no-such-image"):
            open_sandbox("container", SMALL, image="localhost/no-such-image")
    finally:
        subprocess.run([container.engine(), "rmi", "--force", name], capture_output=True, check=True)


@pytest.mark.microvm
def test_a_virtual_machine_of_an_image(root: Path) -> None:
    if reason := missing("microvm"):
        pytest.skip(reason)
    with open_sandbox("microvm", SMALL, image=str(root)) as box:
        assert box.exec("cat /usr/mark; echo x >/usr/mark").stdout == b"of the image"
        assert box.exec([box.python, "-c", "print(1)"]).stdout == b"1\n"
    with pytest.raises(SandboxError, match="image .* is not a folder"):
        open_sandbox("microvm", SMALL, image=str(root / "nothing"))
