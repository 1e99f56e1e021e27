"""Adapters of the family chain-plop."""

from golden_chain_mib import MibChain


class PlopChain(MibChain):
    """PLOP's network and data are the MiB family's."""

    settings_of = ("pod", "pod_logits", "scales", "base_threshold")
    renamed = {}

    def outputs(self, index, session, begun):
        return {"thresholds": session.method.state["thresholds"]} if index else {}


ADAPTERS = {"chain_plop": lambda x, p: PlopChain("plop", x, p).run()}
