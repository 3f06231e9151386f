"""Run the parts of one plan on a Ray cluster and merge them: the thin end of `lm tokenize --executor ray`.

A part is a pure function of the plan and its number, so this file only says where the parts run. The cluster must see
the sources and the output directory under the same paths (a shared file system or URLs). Whatever is killed is
continued by the same command; finished parts are not made again.
"""

from __future__ import annotations

from pathlib import Path

from lmcore.data.encoder import Backend
from lmcore.data.manifest import Manifest
from lmcore.data.merge import merge
from lmcore.data.plan import TokenizeConfig
from lmcore.data.tokenization import tokenize
from lmcore.errors import LmError
from lmcore.progress import SILENT, Progress


def tokenize_on_ray(
    config: TokenizeConfig,
    out: str | Path,
    parts: int,
    *,
    workers: int = 1,
    backend: Backend = "auto",
    progress: Progress = SILENT,
) -> Manifest:
    """Tokenize `parts` parts on the Ray cluster in reach (or a local one) and merge them into `out`.

    workers: cores per part. Raises LmError (2) when Ray is not installed, and what a part raises.
    """
    try:
        import ray
    except ImportError as error:
        raise LmError(
            "--executor ray: Ray is not installed.", hint="Install it: pip install 'lmshards[ray]'"
        ) from error
    out = Path(out).absolute()
    if not ray.is_initialized():
        ray.init(log_to_driver=False, ignore_reinit_error=True)

    def run(number: int) -> str:
        part = TokenizeConfig.model_validate({**config.model_dump(), "part": number, "parts": parts})
        return str(tokenize(part, part_directory(out, number, parts), workers=workers, backend=backend).path)

    remote = ray.remote(num_cpus=workers, max_retries=0)(run)
    waiting = [remote.remote(number) for number in range(1, parts + 1)]
    directories: list[str] = []
    progress.start("parts", float(parts), "parts")
    try:
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            directories.extend(ray.get(done))
            progress.advance(1)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LmError):
            raise error.cause from error
        raise
    finally:
        progress.finish()
    return merge(directories, out)


def part_directory(out: Path, number: int, parts: int) -> Path:
    """Where part `number` of a set lies: beside it."""
    return out.with_name(f"{out.name}-part-{number:03d}-of-{parts:03d}")
