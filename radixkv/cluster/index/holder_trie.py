"""A trie of token sequences that knows, for each token of each of them, who holds it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from radixkv.cache.token_ids import TOKEN_BYTES, common_tokens


class HolderNode:
    """One edge of the trie and the point where it ends.

    Attributes:
        key: the edge's tokens, little-endian int32; empty in a root.
        end: tokens from the root to the end of the edge.
        mask: the bits of all who hold the edge, whole.
        ends: the bits of those whose sequence ends exactly here, though others may go on.
        page_keys: the names of the pages that end on this edge, in order; None where a name is not known.
        tail_key: the name of the tail that ends here, if any holder has one.
        namespace_key: set in roots alone.
        children: by the first token of their edges, 4 bytes.
        parent: None in a root, and in a node that has left the trie.
        used: number of the last call that came here.
    """

    __slots__ = ("children", "end", "ends", "key", "mask", "namespace_key", "page_keys", "parent", "tail_key", "used")

    def __init__(self, key: bytes, end: int, parent: HolderNode | None, mask: int, page_keys: list[int | None]) -> None:
        self.key, self.end, self.parent, self.mask, self.page_keys = key, end, parent, mask, page_keys
        self.ends = 0
        self.tail_key: int | None = None
        self.namespace_key: bytes | None = None
        self.children: dict[bytes, HolderNode] = {}
        self.used = 0

    @property
    def start(self) -> int:
        """Tokens from the root to the edge."""
        return self.end - len(self.key) // TOKEN_BYTES

    @property
    def in_trie(self) -> bool:
        return self.parent is not None or not self.key


class HolderTrie:
    """Sequences of tokens under several roots, shared down to the token, with the set of holders of each edge.

    A set of holders is an integer with one bit for each. What a holder has is closed under prefixes: who holds a token
    holds all before it. So the longest prefix of a prompt that a holder has ends where its bit does.

    Invariants, proved by `check_invariants`:

    - the mask of a child lies within that of its parent, and no mask is 0 but that of a root, which means nothing;
    - an edge ends where another begins, where holders differ, or where a sequence ends: nowhere else;
    - `node_of_page` and `node_of_tail` name the node on whose edge a page ends, or at whose end a tail does.

    A node keeps its end as long as it is in the trie: cuts put a new node above it, and merges take away the upper one.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.roots: dict[bytes, HolderNode] = {}
        self.node_of_page: dict[int, HolderNode] = {}
        self.node_of_tail: dict[int, HolderNode] = {}
        self.num_bytes = 0  # of all edges

    # -- growing -----------------------------------------------------------------------------------------------------

    def root(self, namespace_key: bytes) -> HolderNode:
        """The root of a namespace, made if there is none; `drop_empty_root` takes it back. O(1)."""
        root = self.roots.get(namespace_key)
        if root is None:
            root = self.roots[namespace_key] = HolderNode(b"", 0, None, 0, [])
            root.namespace_key = namespace_key
        return root

    def cover(
        self, node: HolderNode, depth: int, tokens: bytes, bit: int, page_keys: Sequence[int] = ()
    ) -> list[HolderNode]:
        """Let `bit` hold `tokens` after the first `depth` tokens of the path to `node`, on whose edge they end.

        `page_keys` names the whole pages of `tokens`, which begin at the start of a page. O(tokens).

        Returns: the nodes on the way, the last of which covers the last token, and may go on.
        """
        first_page, last = depth // self.page_size, depth + len(tokens) // TOKEN_BYTES
        start, position, visited = depth, 0, []
        while position < len(tokens):
            if depth == node.end:
                child = node.children.get(tokens[position : position + TOKEN_BYTES])
                node = child or self._add_leaf(node, tokens[position:])
            offset = (depth - node.start) * TOKEN_BYTES
            common = self._common_bytes(node.key, offset, tokens, position)
            position += common
            depth += common // TOKEN_BYTES
            if depth < node.end and (position < len(tokens) or not node.mask & bit):
                node = self.split(node, depth)
            node.mask |= bit
            visited.append(node)
            if page_keys:
                self._name_pages(node, max(node.start, start), min(node.end, last), page_keys, first_page)
        for upper in visited:
            self._merge_up(upper)
        return visited

    def split(self, node: HolderNode, depth: int) -> HolderNode:
        """Cut the edge of `node` at `depth`. Returns the new upper node; `node` is the lower one. O(tokens, pages)."""
        parent, start = node.parent, node.start
        assert parent is not None, "a root has no edge"
        assert start < depth < node.end, (start, depth, node.end)
        size = (depth - start) * TOKEN_BYTES
        num_pages = depth // self.page_size - start // self.page_size
        upper = HolderNode(node.key[:size], depth, parent, node.mask, node.page_keys[:num_pages])
        upper.used = node.used
        self._point(upper)
        node.key, node.page_keys, node.parent = node.key[size:], node.page_keys[num_pages:], upper
        upper.children[node.key[:TOKEN_BYTES]] = node
        parent.children[upper.key[:TOKEN_BYTES]] = upper
        return upper

    def _add_leaf(self, parent: HolderNode, tokens: bytes) -> HolderNode:
        end = parent.end + len(tokens) // TOKEN_BYTES
        num_pages = end // self.page_size - parent.end // self.page_size
        leaf = HolderNode(tokens, end, parent, 0, [None] * num_pages)
        leaf.used = parent.used
        parent.children[tokens[:TOKEN_BYTES]] = leaf
        self.num_bytes += len(tokens)
        return leaf

    def _name_pages(self, node: HolderNode, start: int, end: int, page_keys: Sequence[int], first_page: int) -> None:
        """Name the pages that end in `(start, end]`, which lies on the edge of `node`."""
        first, last = start // self.page_size, end // self.page_size
        known = slice(first - node.start // self.page_size, last - node.start // self.page_size)
        names = list(page_keys[first - first_page : last - first_page])
        if node.page_keys[known] != names:
            for old in node.page_keys[known]:
                self._forget_page(old, node)
            node.page_keys[known] = names
            self.node_of_page.update(dict.fromkeys(names, node))

    # -- shrinking ---------------------------------------------------------------------------------------------------

    def uncover(self, node: HolderNode, bit: int, floor: int) -> None:
        """Let `bit` hold nothing any more from the end of `node` up to `floor` tokens.

        What other sequences of the same holder share with it stays. O(nodes and children on the way).
        """
        self._tidy(self._clear_up(node, bit, floor))

    def cut_off(self, node: HolderNode, bit: int, floor: int) -> list[HolderNode]:
        """As `uncover`, and nothing below `node` either. O(nodes) if there is something.

        Returns: the nodes below at whose ends a sequence of the holder ended.
        """
        found, ended = self._clear_below(node, bit)
        self._tidy([*found, *self._clear_up(node, bit, floor)])
        return ended

    def _clear_up(self, node: HolderNode, bit: int, floor: int) -> list[HolderNode]:
        """Clear `bit` from the end of `node` up to `floor`. Returns: where it was, and the node that it stopped at."""
        changed, current = [], node
        while current.end > floor:
            if current.ends & bit or any(child.mask & bit for child in current.children.values()):
                break
            if current.start < floor:
                self.split(current, floor)
            current.mask &= ~bit
            changed.append(current)
            assert current.parent is not None, current
            current = current.parent
        return [*changed, current]

    def uncover_all(self, bits: int) -> list[HolderNode]:
        """Let nobody of `bits` hold anything. O(nodes).

        Returns: the nodes at whose ends their sequences ended.
        """
        all_ended = []
        for root in list(self.roots.values()):
            found, ended = self._clear_below(root, bits)
            self._tidy([*found, root])
            all_ended += ended
        return all_ended

    def _clear_below(self, node: HolderNode, bits: int) -> tuple[list[HolderNode], list[HolderNode]]:
        """Clear `bits` below `node`. Returns: where they were, the deepest first; and where sequences ended."""
        if not any(child.mask & bits for child in node.children.values()):
            return [], []
        found = [below for below in self.below(node) if below.mask & bits]
        ended = [below for below in found if below.ends & bits]
        for below in found:
            below.mask &= ~bits
            below.ends &= ~bits
        found.reverse()
        return found, ended

    def remove_leaf(self, leaf: HolderNode) -> None:
        """Take a leaf away, whoever holds it. O(pages)."""
        assert not leaf.children, leaf
        parent = leaf.parent
        assert parent is not None, leaf
        leaf.mask = 0
        self._tidy([leaf, parent])

    def drop_empty_root(self, namespace_key: bytes) -> None:
        """Forget a root that nothing was put under."""
        root = self.roots.get(namespace_key)
        if root is not None and not root.children:
            del self.roots[namespace_key]

    def _tidy(self, nodes: Iterable[HolderNode]) -> None:
        """Remove those of `nodes` that nobody holds, deepest first, and merge what nothing keeps apart."""
        left = []
        for node in nodes:
            if not node.mask and node.parent is not None:
                self._unlink(node)
            else:
                left.append(node)
        for node in left:
            if node.in_trie and len(node.children) == 1:
                (child,) = node.children.values()
                self._merge_up(child)
            if node.in_trie:
                self._merge_up(node)
            if node.namespace_key is not None:
                self.drop_empty_root(node.namespace_key)

    def _unlink(self, node: HolderNode) -> None:
        assert node.parent is not None, node
        assert not node.children, "a child was held by somebody who does not hold its parent"
        del node.parent.children[node.key[:TOKEN_BYTES]]
        node.parent = None
        self.num_bytes -= len(node.key)
        for name in node.page_keys:
            self._forget_page(name, node)
        self.forget_tail(node)

    def name_tail(self, node: HolderNode, tail_key: int) -> None:
        """Name the tail that ends at `node`."""
        if node.tail_key != tail_key:
            self.forget_tail(node)
            node.tail_key = tail_key
        self.node_of_tail[tail_key] = node

    def forget_tail(self, node: HolderNode) -> None:
        """Forget the name of the tail that ends at `node`."""
        if node.tail_key is not None and self.node_of_tail.get(node.tail_key) is node:
            del self.node_of_tail[node.tail_key]
        node.tail_key = None

    def _forget_page(self, name: int | None, node: HolderNode) -> None:
        if name is not None and self.node_of_page.get(name) is node:
            del self.node_of_page[name]

    def _merge_up(self, lower: HolderNode) -> None:
        """Let `lower` take up the edge of its parent, if nothing keeps them apart."""
        upper = lower.parent
        if upper is None or upper.parent is None or len(upper.children) > 1 or upper.ends or upper.mask != lower.mask:
            return
        self.forget_tail(upper)
        lower.key = upper.key + lower.key
        lower.page_keys = upper.page_keys + lower.page_keys
        for name in upper.page_keys:
            if name is not None and self.node_of_page.get(name) is upper:
                self.node_of_page[name] = lower
        lower.parent = upper.parent
        lower.parent.children[lower.key[:TOKEN_BYTES]] = lower
        upper.parent = None

    def _point(self, node: HolderNode) -> None:
        for name in node.page_keys:
            if name is not None:
                self.node_of_page[name] = node

    # -- looking -----------------------------------------------------------------------------------------------------

    def below(self, node: HolderNode) -> Iterator[HolderNode]:
        """The nodes below `node`, parents first. O(1) a node."""
        stack = list(node.children.values())
        while stack:
            below = stack.pop()
            yield below
            stack.extend(below.children.values())

    def nodes(self) -> Iterator[HolderNode]:
        """All nodes but roots, parents first. O(1) a node."""
        for root in self.roots.values():
            yield from self.below(root)

    def leaves(self) -> list[HolderNode]:
        """All nodes that nothing follows. O(nodes)."""
        return [node for node in self.nodes() if not node.children]

    @staticmethod
    def _common_bytes(key: bytes, offset: int, tokens: bytes, position: int) -> int:
        """Bytes that `key` from `offset` on and `tokens` from `position` on have in common, in whole tokens."""
        size = min(len(key) - offset, len(tokens) - position)
        if size == len(key) and tokens.startswith(key, position):
            return size
        return common_bytes(key, offset, tokens, position)

    def check_invariants(self) -> None:
        """Prove the invariants of the class docstring. O(tokens)."""
        num_bytes, pages, tails = 0, {}, {}
        for node in self.nodes():
            parent = node.parent
            assert parent is not None
            assert parent.children[node.key[:TOKEN_BYTES]] is node
            assert node.mask, "an edge that nobody holds"
            assert not parent.key or node.mask & ~parent.mask == 0, "a holder lacks what lies before"
            assert node.ends & ~node.mask == 0, "a sequence ends where it is not held"
            assert node.start == parent.end
            is_cut = parent.key and len(parent.children) == 1 and parent.mask == node.mask and not parent.ends
            assert not is_cut, "an edge was cut for nothing"
            assert len(node.page_keys) == node.end // self.page_size - node.start // self.page_size
            num_bytes += len(node.key)
            pages.update({name: node for name in node.page_keys if name is not None})
            if node.tail_key is not None:
                tails[node.tail_key] = node
        assert num_bytes == self.num_bytes, (num_bytes, self.num_bytes)
        assert pages == self.node_of_page
        assert tails == self.node_of_tail
        assert all(root.children for root in self.roots.values()), "a root without children"


def common_bytes(key: bytes, offset: int, tokens: bytes, position: int) -> int:
    """Bytes that `key` from `offset` on and `tokens` from `position` on have in common, in whole tokens. O(tokens)."""
    count = min(len(key) - offset, len(tokens) - position) // TOKEN_BYTES
    ours = np.frombuffer(key, np.int32, count, offset)
    return TOKEN_BYTES * common_tokens(ours, np.frombuffer(tokens, np.int32, count, position))
