"""Who is to be told when the children of a node change."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from radixkv.cache.namespace import Namespace
from radixkv.cache.tree.node import TreeNode


class Subscription:
    """To be told, once, when one child of one node comes, goes or gets another edge, or when the node leaves the tree.

    Between being told and the next `Subscriptions.add` it refers to no node.

    Attributes:
        first_page: the bytes that the child's edge begins with.
        subscribers: all who are told of the same node; None after it was told, and before it is added.
        on_change: called when it is told, in the middle of an operation of the tree: it may take a note, and must not
            fail, nor use the tree.
    """

    __slots__ = ("first_page", "on_change", "subscribers")

    def __init__(self, on_change: Callable[[], object] | None = None) -> None:
        self.first_page = b""
        self.subscribers: Subscribers | None = None
        self.on_change = on_change

    def tell(self) -> None:
        """Say that it changes; whoever calls this has taken it out of `subscribers`."""
        self.subscribers = None
        if self.on_change is not None:
            self.on_change()


class Subscribers:
    """The subscriptions to the children of one node. It exists only while there are any.

    Attributes:
        owner: the node; for a root its namespace, also while there is no root.
        changes: times that any child came, went, or got another edge since this was made.
    """

    __slots__ = ("_by_page", "changes", "owner")

    def __init__(self, owner: TreeNode | Namespace) -> None:
        self.owner = owner
        self.changes = 0
        self._by_page: dict[bytes, dict[Subscription, None]] = {}  # a dict is a set in order

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._by_page)

    def add(self, subscription: Subscription) -> None:
        """Tell `subscription` of the child that begins with its `first_page`. O(1)."""
        self._by_page.setdefault(subscription.first_page, {})[subscription] = None
        subscription.subscribers = self

    def discard(self, subscription: Subscription) -> None:
        """Tell `subscription` nothing any more. O(1)."""
        same_page = self._by_page[subscription.first_page]
        del same_page[subscription]
        if not same_page:
            del self._by_page[subscription.first_page]
        subscription.subscribers = None

    def tell(self, first_page: bytes) -> None:
        """The child that begins with `first_page` came, went or got another edge. O(1), and O(1) for each one told."""
        self.changes += 1
        for subscription in self._by_page.pop(first_page, ()):
            subscription.tell()

    def tell_all(self) -> None:
        """The node left the tree. O(subscriptions)."""
        self.changes += 1
        by_page, self._by_page = self._by_page, {}
        for same_page in by_page.values():
            for subscription in same_page:
                subscription.tell()


class Subscriptions:
    """All subscriptions to the nodes of one tree. A tree calls `tell` and `tell_all` for nodes with subscribers.

    Attributes:
        of_roots: the subscribers of each namespace's root, also while there is no root.
        dropped: those that nobody needs any more. They are removed with the next `add`: a `__del__` may append to it,
            which can run in the middle of any operation.
    """

    def __init__(self, roots: Mapping[Namespace, TreeNode]) -> None:
        self._roots = roots
        self.of_roots: dict[Namespace, Subscribers] = {}
        self.dropped: deque[Subscription] = deque()

    def add(self, subscription: Subscription, node: TreeNode | None, namespace: Namespace, first_page: bytes) -> int:
        """Tell `subscription`, which is not subscribed, once the child of `node` that begins with `first_page` changes.

        Without a `node`, of the root of `namespace`, which need not be there yet. O(1).

        Returns: the `changes` of its subscribers so far.
        """
        while self.dropped:
            self.remove(self.dropped.popleft())
        subscription.first_page = first_page
        if node is None or node.namespace is not None:
            subscribers = self.of_roots.get(namespace)
            if subscribers is None:
                subscribers = self.of_roots[namespace] = Subscribers(namespace)
                if (root := self._roots.get(namespace)) is not None:
                    root.subscribers = subscribers
        else:
            assert node.parent is not None, "it left the tree"
            subscribers = node.subscribers
            if subscribers is None:
                subscribers = node.subscribers = Subscribers(node)
        subscribers.add(subscription)
        return subscribers.changes

    def remove(self, subscription: Subscription) -> None:
        """Tell `subscription` nothing any more. Idempotent. O(1)."""
        subscribers = subscription.subscribers
        if subscribers is not None:
            subscribers.discard(subscription)
            if not subscribers:
                self._drop(subscribers)

    def node_of(self, subscription: Subscription) -> TreeNode | None:
        """The node that `subscription` was added to, unless it was told or removed since, or that is a root. O(1)."""
        owner = None if subscription.subscribers is None else subscription.subscribers.owner
        return owner if isinstance(owner, TreeNode) else None

    def tell(self, subscribers: Subscribers, first_page: bytes) -> None:
        """The child of their node that begins with `first_page` came, went or got another edge. O(those told)."""
        subscribers.tell(first_page)
        if not subscribers:
            self._drop(subscribers)

    def tell_all(self, subscribers: Subscribers) -> None:
        """Their node left the tree. O(those told)."""
        subscribers.tell_all()
        self._drop(subscribers)

    def _drop(self, subscribers: Subscribers) -> None:
        """Forget that a node has had subscribers."""
        owner = subscribers.owner
        if isinstance(owner, TreeNode):
            owner.subscribers = None
            return
        del self.of_roots[owner]
        if (root := self._roots.get(owner)) is not None:
            root.subscribers = None
