"""Make a base image for ``make image-check`` on machines that cannot reach an image registry."""

from __future__ import annotations

import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from deploy.containers import Buildah, run

BASE_IMAGE = "localhost/quartet-base"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
# Shared libraries that CPython and PyTorch need, and the certificates for downloads during the build.
DEBIAN_PACKAGES = (
    "ca-certificates,passwd,libbz2-1.0,libffi8,libgomp1,liblzma5,libreadline8t64,libsqlite3-0,libssl3t64,zlib1g"
)
# The service does not need these files, and the image python:slim does not contain them.
UNUSED_DEBIAN = ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists")
UNUSED_PYTHON = ("test", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "site-packages", "config-*")


def make_base(suite: str, mirror: str) -> None:
    """Make the base image from Debian packages and the Python that runs this script.

    Raises:
        CheckError: debootstrap or buildah failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "root"
        run("debootstrap", "--variant=minbase", f"--include={DEBIAN_PACKAGES}", suite, str(root), mirror)
        for name in UNUSED_DEBIAN:
            shutil.rmtree(root / name, ignore_errors=True)
        copy_python(Path(sys.base_prefix), root / "usr" / "local")
        run("chroot", str(root), "ldconfig")
        if Path(CERTIFICATES).exists():  # this machine may trust more certificates, such as the certificate of a proxy
            shutil.copyfile(CERTIFICATES, root / CERTIFICATES.lstrip("/"))
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        environment = f"ENV PATH={path} SSL_CERT_FILE={CERTIFICATES}"
        (Path(scratch) / "Dockerfile").write_text(f"FROM scratch\nCOPY root /\n{environment}\n")
        run(*Buildah.storage, "bud", "--isolation", "chroot", "--tag", BASE_IMAGE, scratch)


def copy_python(prefix: Path, target: Path) -> None:
    """Copy the Python interpreter, its standard library and pip from the folder ``prefix`` to ``target``."""
    version = f"python{sysconfig.get_python_version()}"
    library = target / "lib" / version
    ignored = shutil.ignore_patterns("__pycache__", *UNUSED_PYTHON)
    shutil.copytree(prefix / "lib" / version, library, ignore=ignored, symlinks=True)
    for shared in (prefix / "lib").glob("libpython*.so*"):
        shutil.copy2(shared, target / "lib", follow_symlinks=False)
    (target / "bin").mkdir(exist_ok=True)
    shutil.copy2(prefix / "bin" / version, target / "bin" / version)
    for name in ("python", "python3"):
        (target / "bin" / name).symlink_to(version)
    packages = prefix / "lib" / version / "site-packages"
    for name in ("pip", *(path.name for path in packages.glob("pip-*.dist-info"))):
        shutil.copytree(packages / name, library / "site-packages" / name)
