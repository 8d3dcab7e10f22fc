"""Runtime: runs any plan over a process group, forward and backward."""

from sap_hf.runtime.attention import attention

__all__ = ["attention"]
