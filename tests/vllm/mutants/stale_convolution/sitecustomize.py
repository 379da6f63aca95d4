"""What vLLM packed all the same is never packed again."""

from injection import when_imported


def change(module):
    module.Derived.refresh = lambda self: None


when_imported("insitu.live.vllm_plugin.unpacked", change)
