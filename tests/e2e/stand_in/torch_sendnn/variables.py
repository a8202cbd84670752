# SPDX-License-Identifier: Apache-2.0
"""What the environment has to say when the card's software is imported: it is read once.

Where rules are from: see the package.
"""

from collections.abc import Iterator, Mapping

LIMITS = ("CHUNK_LEN", "MAX_CONTEXT_LEN", "MAX_BATCH_SIZE", "MAX_BATCH_TKV_LIMIT")


def faults_of_environment(environment: Mapping[str, str], world_size: int) -> list[str]:
    """Everything that is missing or cannot be, as sentences.

    Args:
        environment: of the process.
        world_size: ranks of the model.
    """
    faults = list(_faults_of_limits(environment))
    wanted = {"COMPILATION_MODE": "offline_decoder"}  # PR#404: or it compiles for other models
    if world_size > 1:  # S v1/worker/spyre_worker.py: or each rank takes the same card
        wanted["WORLD_SIZE"] = str(world_size)
    for name, value in wanted.items():
        if environment.get(name) != value:
            faults.append(f"{name} is {environment.get(name)}, not {value}")
    # S platform.py:405 sets true, A 1; false is for other models than decoders.
    frame = environment.get("FLEX_OVERWRITE_NMB_FRAME", "true")
    if frame.lower() not in ("true", "1"):
        faults.append(f"FLEX_OVERWRITE_NMB_FRAME is {frame}, not true")
    # PR#291: the compiler ignores OMP_NUM_THREADS, and takes every core for each rank.
    required = ["DT_PARALLEL_THREADS", "RANK"] if world_size > 1 else []
    if world_size >= 4:  # PR#638
        required += ["FLEX_HDMA_P2PSIZE", "FLEX_HDMA_COLLSIZE"]
    return faults + [f"{name} is not set" for name in required if name not in environment]


def _faults_of_limits(environment: Mapping[str, str]) -> Iterator[str]:
    given = [environment.get(f"VLLM_DT_{name}", "") for name in LIMITS]
    if not all(value.isdecimal() for value in given):
        yield f"the limits are {given}"  # S platform.py: set before the import
        return
    chunk, context, batch, _ = map(int, given)
    if context % chunk or (context != 3072 and context & (context - 1)):
        yield f"there are no programs for {context} tokens in chunks of {chunk}"  # PR#588
    if batch < 2:
        yield f"a batch of {batch} is less than 2"  # S platform.py:440
