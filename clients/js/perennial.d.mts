export interface FieldError {
  field: string;
  wanted: string;
  position?: number;
}

export class Problem extends Error {
  readonly status: number;
  readonly title: string;
  readonly detail: string;
  readonly errors: FieldError[];
  readonly fields: string[];
  readonly retryAfter: number | null;
  readonly type: string;
  readonly requestId: string | null;
  readonly isTransient: boolean;
}

/** `PushSubscription.toJSON()` of a browser. */
export interface PushSubscriptionJson {
  endpoint: string;
  expirationTime?: number | null;
  keys: { p256dh: string; auth: string };
}

/** Exactly one of these. */
export interface Audience {
  all?: boolean;
  user?: string;
  users?: string[];
  /** An expression: `news and fr and not muted`. */
  tags?: string;
  subscriptions?: number[];
  /** Subscriptions that are not stored. */
  push?: PushSubscriptionJson[];
}

export interface NotifyOptions extends Audience {
  title?: string;
  body?: string;
  url?: string;
  /** Further options of `showNotification`: icon, actions. */
  options?: Record<string, unknown>;
  /** Instead of a title: any value, for a service worker of your own. */
  payload?: unknown;
  /** The same call within 24 hours sends nothing more and returns the same id. */
  idempotencyKey?: string;
  ttl?: number;
  urgency?: "very-low" | "low" | "normal" | "high";
  topic?: string;
  rate?: number;
  rampUp?: string;
  at?: Date | string;
  expires?: Date | string;
  webhook?: string;
  log?: "failures" | "all";
  declarative?: boolean;
  http?: "auto" | "1" | "2";
  /** False sends `{{name}}` as it is, as texts of visitors need it. */
  template?: boolean;
  dryRun?: boolean;
}

export interface Notified {
  id: string;
  state: "scheduled" | "queued";
  audience: number;
  warnings?: string[];
}

export interface DryRun {
  dry_run: true;
  audience: number;
  incomplete?: number;
  warnings: string[];
}

export interface Notification {
  id: string;
  state: "scheduled" | "queued" | "sending" | "paused" | "done" | "cancelled" | "expired";
  audience: number;
  audience_final: boolean;
  outcomes: Record<string, number>;
  decided: number;
  retrying: number;
  rate: number;
  rate_wanted?: number | null;
  created_at: string;
  at?: string | null;
  expires?: string | null;
  started_at?: string | null;
  ended_at?: string | null;
  eta_seconds?: number | null;
  error?: string | null;
}

export interface Subscription {
  id: number;
  endpoint: string;
  user?: string;
  tags: string[];
  metadata?: Record<string, unknown>;
  created_at: string;
  updated_at: string;
}

export interface Delivery {
  subscription: number;
  outcome: string;
  status?: number;
  detail?: string;
  at: string;
}

export interface SubscribeOptions {
  key?: string;
  user?: string;
  tags?: string[];
  metadata?: Record<string, unknown>;
  replaces?: { endpoint: string; auth: string };
}

export class Client {
  constructor(url: string, key: string, limits?: { timeout?: number; attempts?: number; patience?: number });
  notify(notification: NotifyOptions & { dryRun: true }): Promise<DryRun>;
  notify(notification: NotifyOptions): Promise<Notified>;
  notification(id: string): Promise<Notification>;
  notifications(page?: { cursor?: string; limit?: number }): Promise<{ notifications: Notification[]; next?: string }>;
  wait(id: string, seconds?: number): Promise<Notification>;
  pause(id: string): Promise<Notification>;
  resume(id: string): Promise<Notification>;
  cancel(id: string): Promise<Notification>;
  setRate(id: string, rate: number | null): Promise<Notification>;
  deliveries(id: string, outcome?: string): Promise<Delivery[]>;
  pushKey(): Promise<string>;
  subscribe(subscription: PushSubscriptionJson, options?: SubscribeOptions): Promise<number>;
  logout(subscription: PushSubscriptionJson): Promise<number>;
  unsubscribe(which: number | string): Promise<boolean>;
  subscription(id: number): Promise<Subscription>;
  subscriptions(filter?: { user?: string; tag?: string; endpoint?: string; cursor?: number; limit?: number }):
    Promise<{ subscriptions: Subscription[]; next?: number }>;
  user(user: string): Promise<{ user: string; subscriptions: Subscription[]; deliveries: object[] }>;
  deleteUser(user: string): Promise<{ subscriptions: number; deliveries: number }>;
  enqueue(kind: string, payload: object, options?: { delay?: string; unique?: string; priority?: number }):
    Promise<string>;
  static userToken(user: string, secret: string, options?: { site?: string; seconds?: number }): string;
}
