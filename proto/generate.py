#!/usr/bin/env python3
"""Write the committed Python stubs of ``proto/gpu_sim.proto`` into ``dsml_gpu/wire/``, or check that they are current.

    python proto/generate.py            write them
    python proto/generate.py --check    exit 1 with a summary where what is committed is not what would be written

Exit code 2 means that the stubs cannot be generated here, because none of this machine's Pythons can run the pinned
generator (``--check`` has then checked nothing).

Why an old generator in an environment of its own: generated code refuses a protobuf runtime older than its generator,
and a generator of grpcio-tools >= 1.63 would raise our lower bound to protobuf 5. The code of protoc 25 is the newest
that carries no such check, and it still runs under protobuf 7, so one set of committed stubs serves the whole range
which pyproject.toml names. That generator has wheels for Python 3.12 at the newest; the environment, ``.venv-protoc/``,
is made with the first Python that fits, and is kept.

Why the proto file is compiled under the name ``dsml_gpu/wire/gpu_sim.proto`` (the ``-I`` mapping): protoc derives the
import inside ``gpu_sim_pb2_grpc.py`` from it, so nothing has to be edited afterwards.

What that cannot solve: messages are registered in a table of the process by their full names, ``gpu_sim.DeviceId`` and
so on. A process that has imported ``dsml_gpu.wire.gpu_sim_pb2`` cannot import a module generated from another copy of
the contract: where the same message is in both, the second import raises ``TypeError: Couldn't build proto file into
descriptor pool: duplicate symbol``, with protobuf 4.25 as with 7, be the copies equal or not. Clients with stubs of
their own talk to a server in another process.
"""

from __future__ import annotations

import argparse
import difflib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-protoc"
PACKAGE_DIR = "dsml_gpu/wire"
OUTPUTS = ("gpu_sim_pb2.py", "gpu_sim_pb2.pyi", "gpu_sim_pb2_grpc.py", "gpu_sim_pb2_grpc.pyi")

# Installed with --no-deps: this is all that the generator runs, each at one version, so that the output is the same
# everywhere.
PINS = (
    "grpcio-tools==1.62.3",  # protoc 25.1, the last whose code does not ask for a newer runtime
    "protobuf==4.25.9",
    "mypy-protobuf==3.6.0",  # types of gpu_sim_pb2_grpc; protoc itself writes only those of gpu_sim_pb2
    "setuptools==80.9.0",  # grpcio-tools 1.62 imports pkg_resources, which 82 dropped
)
OLDEST, NEWEST = (3, 8), (3, 12)  # the Pythons that have wheels of all PINS

EXIT_STALE, EXIT_NO_GENERATOR = 1, 2


class NoGenerator(Exception):
    """The pinned generator cannot be had on this machine."""


def find_python() -> str:
    """Return an interpreter that the pinned generator has wheels for: this one, or one on PATH."""
    minors = range(NEWEST[1], OLDEST[1] - 1, -1)
    here = [sys.executable] if OLDEST <= sys.version_info[:2] <= NEWEST else []
    for python in (*here, *filter(None, (shutil.which(f"python3.{minor}") for minor in minors))):
        # Not every one that is found will do: version managers put names on PATH that only answer with an error, and
        # some systems leave out what makes environments.
        if subprocess.run([python, "-c", "import ensurepip, venv"], capture_output=True, check=False).returncode == 0:
            return python
    raise NoGenerator(
        f"{PINS[0]} has wheels for Python {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}; this is Python "
        f"{sys.version_info[0]}.{sys.version_info[1]}, and none on PATH is one of those and has venv"
    )


def generator() -> Path:
    """Return the Python of the generator's environment, which is made where it is absent or has other pins."""
    stamp = VENV / "pins.txt"
    python = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    pins = "\n".join(PINS) + "\n"
    if python.exists() and stamp.exists() and stamp.read_text() == pins:
        return python
    base = find_python()
    print(f"proto/generate.py: making {VENV.name}/ with {base}", file=sys.stderr)
    subprocess.run([base, "-m", "venv", "--clear", str(VENV)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*install, "--only-binary", ":all:", *PINS], check=False)
    if done.returncode != 0:
        raise NoGenerator(f"pip could not install {', '.join(PINS)} (its own message is above)")
    stamp.write_text(pins)  # last, so that an environment cut short is made again
    return python


def generate(out: Path) -> None:
    """Write all OUTPUTS below ``out``/dsml_gpu/wire."""
    python = generator()
    plugin = python.with_name("protoc-gen-mypy_grpc" + python.suffix)
    command = [str(python), "-m", "grpc_tools.protoc", f"-I{PACKAGE_DIR}={ROOT / 'proto'}"]
    command += [f"--plugin=protoc-gen-mypy_grpc={plugin}", "--mypy_grpc_out=quiet:" + str(out)]
    command += [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([*command, f"{PACKAGE_DIR}/gpu_sim.proto"], check=True)


def differences(made: Path, committed: Path) -> list[str]:
    """Return one paragraph for each of OUTPUTS that differs."""
    found = []
    for name in OUTPUTS:
        old = committed.joinpath(name).read_text().splitlines() if committed.joinpath(name).exists() else []
        new = made.joinpath(name).read_text().splitlines()
        if old != new:
            diff = list(difflib.unified_diff(old, new, f"committed/{name}", f"generated/{name}", lineterm="", n=0))
            # The descriptor is one line of many kB; a summary has no use for all of it.
            shown = [line if len(line) <= 160 else line[:157] + "..." for line in diff[:12]]
            if len(diff) > len(shown):
                shown.append(f"... {len(diff) - len(shown)} more lines")
            found.append("\n".join(shown))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where what is committed is stale")
    check = parser.parse_args().check
    committed = ROOT / PACKAGE_DIR
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, PACKAGE_DIR)
        try:
            generate(Path(scratch))
        except NoGenerator as error:
            print(f"proto/generate.py: cannot generate here: {error}", file=sys.stderr)
            return EXIT_NO_GENERATOR
        stale = differences(made, committed)
        if check and stale:
            print("\n\n".join(stale))
            print(f"\n{len(stale)} of {len(OUTPUTS)} stubs are stale: run python proto/generate.py")
            return EXIT_STALE
        if not check:
            for name in OUTPUTS:
                shutil.copyfile(made / name, committed / name)
    print(f"{PACKAGE_DIR}: {'current' if check or not stale else f'{len(stale)} of {len(OUTPUTS)} stubs changed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
