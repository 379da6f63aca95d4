"""What runs inside vLLM: a load format whose weights lie in the arena, and the routes by which they are trained.

vLLM imports this in each of its processes, ours or not, so it is cheap until the load format is asked for.
"""

LOAD_FORMAT = "insitu"


def register() -> None:
    """``vllm.general_plugins`` entry point: make ``--load-format insitu`` known. Called more than once."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader

    if LOAD_FORMAT not in _LOAD_FORMAT_TO_MODEL_LOADER:
        from insitu.live.vllm_plugin.loader import ArenaLoader

        register_model_loader(LOAD_FORMAT)(ArenaLoader)
