"""On PYTHONPATH of a vLLM: a publish that forgets nothing, the defect that the check of replies must find."""

import importlib.util
import sys


class _Finder:
    """Changes one module as soon as it is imported, and leaves every other alone."""

    def find_spec(self, name, path=None, target=None):
        if name != "insitu.live.engines.vllm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_change(module):
            execute(module)
            change(module)

        spec.loader.exec_module = execute_and_change
        return spec


def change(module):
    async def forget_nothing(self, version):
        await self._client.update_weight_version(version)

    module.VLLMEngine._forget = forget_nothing


sys.meta_path.insert(0, _Finder())
