"""Packing is left on: vLLM makes private copies of its matrices and never looks at the arena again."""

from injection import when_imported


def change(module):
    module.keep_plain = lambda model: None


when_imported("insitu.live.vllm_plugin.unpacked", change)
