//! Sessions of browsers, passwords of users, and CSRF tokens, as an application uses them.

use perennial::anyhow;
use perennial::api::Error;
use perennial::axum::extract::FromRef;
use perennial::http::{HeaderMap, StatusCode, header};
use perennial::passwords::{PasswordCheck, Passwords};
use perennial::prelude::*;
use perennial::secrecy::SecretString;
use perennial::server::http::problem::Problem;
use perennial::sessions::{self, Session, Sessions};
use perennial::testing::{TestAnswer, TestClient, TestProgram};
use serde::Deserialize;
use serde_json::{Value, json};

/// A module with users who log in.
struct Members;

#[derive(Clone)]
struct Shared {
    sessions: Sessions,
    passwords: Passwords,
    hash: String,
}

impl FromRef<Shared> for Sessions {
    fn from_ref(shared: &Shared) -> Self {
        shared.sessions.clone()
    }
}

impl Module for Members {
    const NAME: &'static str = "members";

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        let passwords = host.passwords();
        let shared = Shared {
            sessions: host.sessions(sessions::Config::default()).await?,
            hash: passwords.hash(&"open sesame".into()).await?,
            passwords,
        };
        let routes = Router::new()
            .route("/cart", get(cart).post(fill_cart))
            .route("/login", post(login))
            .route("/logout", post(logout))
            .route("/logout-everywhere", post(logout_everywhere));
        host.routes(routes.with_state(shared));
        Ok(())
    }
}

#[derive(Deserialize)]
struct Login {
    user: String,
    password: SecretString,
}

async fn login(
    State(shared): State<Shared>,
    session: Option<Session>,
    Json(login): Json<Login>,
) -> Result<([(header::HeaderName, header::HeaderValue); 1], Json<Value>)> {
    let hash = (login.user == "ada").then_some(shared.hash.as_str());
    let check = shared.passwords.check(&login.password, hash).await.map_err(anyhow::Error::from)?;
    if check != PasswordCheck::Right {
        return Err(Problem::new(StatusCode::UNAUTHORIZED, "wrong user or password").into());
    }
    let (session, cookie) = shared.sessions.login(session, &login.user).await?;
    let csrf = shared.sessions.csrf_token(&session);
    Ok(([(header::SET_COOKIE, cookie)], Json(json!({ "csrf": csrf }))))
}

async fn cart(session: Session) -> Json<Value> {
    Json(json!({ "user": session.user(), "cart": session.get::<Vec<u32>>("cart") }))
}

async fn fill_cart(
    State(shared): State<Shared>,
    session: Option<Session>,
    headers: HeaderMap,
    Json(cart): Json<Vec<u32>>,
) -> Result<([(header::HeaderName, header::HeaderValue); 1], StatusCode)> {
    let (mut session, cookie) = match session {
        Some(session) => {
            let token = headers.get("x-csrf").and_then(|token| token.to_str().ok()).unwrap_or_default();
            shared.sessions.check_csrf(&session, token).map_err(Error::from)?;
            let cookie = shared.sessions.cookie(&session);
            (session, cookie)
        }
        None => shared.sessions.begin().await?,
    };
    session.set("cart", cart);
    shared.sessions.save(&session).await?;
    Ok(([(header::SET_COOKIE, cookie)], StatusCode::NO_CONTENT))
}

async fn logout(
    State(shared): State<Shared>,
    session: Session,
) -> Result<[(header::HeaderName, header::HeaderValue); 1]> {
    Ok([(header::SET_COOKIE, shared.sessions.logout(session).await?)])
}

async fn logout_everywhere(State(shared): State<Shared>, session: Session) -> Result<Json<u64>> {
    Ok(Json(shared.sessions.logout_everywhere(session.user().unwrap_or_default()).await?))
}

async fn members(embedded: bool) -> anyhow::Result<TestProgram> {
    let program = Perennial::new().host::<Members>().test();
    if embedded { program.embedded().start().await } else { program.start().await }
}

/// The `Set-Cookie` of an answer, and a client with that cookie.
fn with_cookie(client: &TestClient, answer: &TestAnswer) -> (String, TestClient) {
    let set = answer.headers["set-cookie"].to_str().unwrap().to_owned();
    let cookie = set.split(';').next().unwrap().to_owned();
    (set, client.clone().with_header("cookie", &cookie))
}

#[tokio::test]
async fn a_login_begins_a_session_that_a_logout_ends_on_both_stores() -> anyhow::Result<()> {
    for embedded in [true, false] {
        let members = members(embedded).await?;
        let anyone = members.client().without_key();
        assert_eq!(anyone.get("/cart").await?.status, 401);
        let filled = anyone.post("/cart", &json!([17])).await?;
        let (set, guest) = with_cookie(&anyone, &filled);
        for part in ["__Host-session=", "HttpOnly", "Secure", "SameSite=Lax", "Path=/", "Max-Age="] {
            assert!(set.contains(part), "{set}");
        }
        assert_eq!(guest.get("/cart").await?.json(), json!({ "user": null, "cart": [17] }));

        let wrong = guest.post("/login", &json!({ "user": "ada", "password": "open" })).await?;
        assert_eq!(wrong.status, 401);
        let stranger = guest.post("/login", &json!({ "user": "bob", "password": "open sesame" })).await?;
        assert_eq!(
            (stranger.status, stranger.body),
            (wrong.status, wrong.body),
            "it does not tell who is a user"
        );
        let right = guest.post("/login", &json!({ "user": "ada", "password": "open sesame" })).await?;
        assert_eq!(right.status, 200, "{}", right.text());
        let (_, ada) = with_cookie(&guest, &right);
        assert_eq!(ada.get("/cart").await?.json(), json!({ "user": "ada", "cart": [17] }));
        assert_eq!(guest.get("/cart").await?.status, 401, "the id from before the login is worth nothing");

        assert_eq!(ada.post("/cart", &json!([18])).await?.status, 403, "another site has no token");
        let csrf = right.json()["csrf"].as_str().unwrap().to_owned();
        let form = ada.clone().with_header("x-csrf", &csrf);
        assert_eq!(form.post("/cart", &json!([18])).await?.status, 204);
        assert_eq!(ada.get("/cart").await?.json()["cart"], json!([18]));
        assert_eq!(form.post("/cart", &json!(vec![1; 20_000])).await?.status, 422, "data has a limit");

        let again = anyone.post("/login", &json!({ "user": "ada", "password": "open sesame" })).await?;
        let (_, elsewhere) = with_cookie(&anyone, &again);
        assert_eq!(elsewhere.post("/logout-everywhere", &json!(null)).await?.json(), json!(2));
        assert_eq!(ada.get("/cart").await?.status, 401);
        members.stop().await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_cookie_that_was_not_signed_here_and_a_session_that_has_ended_open_nothing() -> anyhow::Result<()> {
    let members = members(true).await?;
    let anyone = members.client().without_key();
    let right = anyone.post("/login", &json!({ "user": "ada", "password": "open sesame" })).await?;
    let (set, ada) = with_cookie(&anyone, &right);
    let value = set.split(['=', ';']).nth(1).unwrap();
    let (id, signature) = value.split_once('.').unwrap();
    let others = format!("{}.{signature}", "A".repeat(id.len()));
    for wrong in ["", "x", ".", id, &others, &format!("{id}.AAAA"), &format!("{id}.")] {
        let client = anyone.clone().with_header("cookie", &format!("__Host-session={wrong}"));
        assert_eq!(client.get("/cart").await?.status, 401, "{wrong}");
    }
    let beside =
        anyone.clone().with_header("cookie", &format!("a=b; __Host-session=x; __Host-session={value}"));
    assert_eq!(beside.get("/cart").await?.status, 200);
    assert_eq!(ada.get("/cart").await?.status, 200);
    let stored: String = members.store().value("SELECT id FROM sessions", perennial::values![]).await?;
    assert!(!value.contains(&stored), "a copy of the store opens no session");
    members.store().execute("UPDATE sessions SET ends_at = 1", perennial::values![]).await?;
    assert_eq!(ada.get("/cart").await?.status, 401);
    let run = members.admin().post("/schedules/sessions.retention/run", &json!({})).await?;
    assert!(run.status.is_success(), "{}", run.text());
    members.jobs().run_until_idle().await?;
    let left: i64 = members.store().value("SELECT count(*) FROM sessions", perennial::values![]).await?;
    assert_eq!(left, 0);
    let logged_in = anyone.post("/login", &json!({ "user": "ada", "password": "open sesame" })).await?;
    let (_, ada) = with_cookie(&anyone, &logged_in);
    let out = ada.post("/logout", &json!(null)).await?;
    assert!(out.headers["set-cookie"].to_str()?.contains("Max-Age=0"));
    assert_eq!(ada.get("/cart").await?.status, 401);
    members.stop().await
}
