"""A publish that forgets nothing: keys and values of the old weights stay in the prefix cache and in running requests."""

from injection import when_imported


def change(module):
    async def forget_nothing(self, version):
        await self._client.update_weight_version(version)

    module.VLLMEngine._forget = forget_nothing


when_imported("insitu.live.engines.vllm", change)
