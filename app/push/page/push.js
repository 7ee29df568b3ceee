// The names that /push.js had before /perennial.js, for service workers that import it. The server puts perennial.js
// before this file.

var { base64url, remember, remembered } = perennial.former;

function logout(registration) {
  return perennial.logout({ registration });
}
